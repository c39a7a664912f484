"use strict";
(() => {
  const collator = new Intl.Collator("en", { numeric: true });

  // Tables: a click on a header sorts by that column; what is not known stays last.
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b)));
  const sort = (header) => {
    const table = header.closest("table");
    const column = header.cellIndex;
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    const unknown = (row) => row.cells[column].classList.contains("unknown");
    rows.sort((a, b) => unknown(a) - unknown(b) || (descending ? -1 : 1) * compare(key(a, column), key(b, column)));
    table.tBodies[0].append(...rows);
  };
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => sort(button.parentElement));
  }

  // Legends: one click shows or hides a case in every figure that draws it as a line.
  const plots = [...document.querySelectorAll(".js-plotly-plot")];
  for (const chip of document.querySelectorAll(".chips button[data-series]")) {
    chip.addEventListener("click", () => {
      const shown = chip.getAttribute("aria-pressed") !== "true";
      const series = Number(chip.dataset.series);
      for (const twin of document.querySelectorAll(`.chips button[data-series="${series}"]`)) twin.setAttribute("aria-pressed", String(shown));
      for (const plot of plots) {
        const traces = plot.data.flatMap((trace, index) => (trace.meta === series ? [index] : []));
        if (traces.length) Plotly.restyle(plot, { visible: shown }, traces);
      }
    });
  }

  // One step: one case at a time. A figure that was drawn while hidden does not know its width.
  const choices = [...document.querySelectorAll(".choice button")];
  for (const choice of choices) {
    choice.addEventListener("click", () => {
      for (const other of choices) {
        other.setAttribute("aria-pressed", String(other === choice));
        document.getElementById(other.dataset.panel).hidden = other !== choice;
      }
      for (const plot of plots) if (plot.closest(".panel:not([hidden])")) Plotly.Plots.resize(plot);
    });
  }

  // On a touch screen a finger scrolls the page; it does not zoom a figure.
  if (matchMedia("(pointer: coarse)").matches) for (const plot of plots) Plotly.relayout(plot, { dragmode: false });

  // A link to a case opens it, and paper shows every case.
  const reveal = (hash) => {
    const target = hash ? document.getElementById(hash.slice(1)) : null;
    if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); }
  };
  for (const link of document.querySelectorAll('a[href^="#"]')) link.addEventListener("click", () => reveal(link.hash));
  addEventListener("hashchange", () => reveal(location.hash));
  reveal(location.hash);
  addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });

  document.getElementById("download").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("records").textContent], { type: "application/json" }));
    link.download = "records.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
