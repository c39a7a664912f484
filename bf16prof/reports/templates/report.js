"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const collator = new Intl.Collator("en", { numeric: true });

  // What a reader has chosen stands in the address, behind the anchor: #zero3-w8?sort=summary.2.down&find=bf16. A link shows the same page.
  const read = () => {
    const [anchor, query = ""] = location.hash.slice(1).split("?");
    return { anchor: decodeURIComponent(anchor), chosen: new URLSearchParams(query) };
  };
  const write = (key, value) => {
    const { anchor, chosen } = read();
    if (value) chosen.set(key, value); else chosen.delete(key);
    const query = chosen.toString();
    history.replaceState(null, "", `#${encodeURIComponent(anchor)}${query && "?" + query}`);
  };

  // Figures: what is in sight is drawn at once and the rest one after the other, so that a page opens at once. What is hidden waits until
  // it is shown, for it does not know its width.
  const specs = new Map(all("script[data-figure]").map((script) => [script.dataset.figure, script]));
  const draw = (id) => {
    const { data, layout, config } = JSON.parse(specs.get(id).textContent);
    specs.delete(id);
    const hidden = new Set((read().chosen.get("hidden") || "").split(".").filter(Boolean).map(Number));
    for (const trace of data) if (hidden.has(trace.meta)) trace.visible = false;
    // On a touch screen a finger scrolls the page; it does not zoom a figure.
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
    const plot = document.getElementById(id);
    Plotly.newPlot(plot, data, layout, config);
    if (plot.closest(".treemap")) { trim(plot); plot.on("plotly_afterplot", () => trim(plot)); }
  };
  // Words in a map are made for a wide page: on a narrow one the lines that their area does not hold go. Pointing at it says them.
  const trim = (plot) => {
    const [from, to] = plot.layout.xaxis.range;
    all(".annotation", plot).forEach((words, index) => {
      const { x } = plot.data[Number(plot.layout.annotations[index].name)];
      const room = ((Math.max(...x) - Math.min(...x)) / (to - from)) * plot.clientWidth;
      const lines = all("tspan.line", words);
      for (const line of lines.length ? lines : all("text", words)) line.style.visibility = line.getComputedTextLength() + 6 > room ? "hidden" : "";
    });
  };
  const shown = () => [...specs.keys()].filter((id) => !document.getElementById(id).closest("[hidden]"));
  const drawSeen = () => { for (const id of shown()) draw(id); };
  const drawInTurn = () => {
    const [next] = shown();
    if (next) draw(next);
    document.documentElement.dataset.drawn = shown().length ? "" : "all";
    if (shown().length) setTimeout(drawInTurn);
  };
  const plots = () => all(".js-plotly-plot");

  // Tables: a click on a header sorts by that column; what is not known stays last.
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b)));
  const sort = (header, descending) => {
    const table = header.closest("table");
    const column = header.cellIndex;
    for (const other of all("th", table.tHead)) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    const unknown = (row) => row.cells[column].classList.contains("unknown");
    rows.sort((a, b) => unknown(a) - unknown(b) || (descending ? -1 : 1) * compare(key(a, column), key(b, column)));
    table.tBodies[0].append(...rows);
    demand();
  };
  const sortable = (root) => {
    for (const button of all("th button", root)) {
      const header = button.parentElement;
      button.addEventListener("click", () => {
        const descending = header.getAttribute("aria-sort") === "ascending";
        sort(header, descending);
        const named = header.closest("[id$='-table']");
        if (named) write("sort", `${named.id.replace(/-table$/, "")}.${header.cellIndex}.${descending ? "down" : "up"}`);
      });
    }
    for (const button of all("[data-copy]", root)) button.addEventListener("click", () => copy(button));
  };

  // Tables copy as Markdown and as CSV: the rows that are shown, each cell with the lines below it.
  const texts = (row) => [...row.cells].map((cell) => {
    const lines = all("small", cell).map((small) => small.textContent.trim());
    const whole = cell.textContent.trim();
    return [whole.slice(0, whole.length - lines.join("").length), ...lines].filter(Boolean).join(", ");
  });
  const csv = (text) => (/^[=+@\t\r-]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text);
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const copy = async (button) => {
    const table = button.closest(".table").querySelector("table");
    const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden || row.dataset.late !== undefined).map(texts);
    const head = texts(table.tHead.rows[0]);
    const line = (cells) => `| ${cells.map((text) => text.replaceAll("|", "\\|").replaceAll("<", "&lt;")).join(" | ")} |`;
    const written = button.dataset.copy === "csv"
      ? [head, ...rows].map((cells) => cells.map((text) => quoted(csv(text))).join(",")).join("\n")
      : [line(head), line(head.map(() => "---")), ...rows.map(line)].join("\n");
    const said = button.textContent;
    try { await navigator.clipboard.writeText(written + "\n"); button.textContent = "copied"; } catch { byHand(written + "\n"); button.textContent = "copied"; }
    setTimeout(() => { button.textContent = said; }, 1500);
  };
  const byHand = (text) => {
    const area = Object.assign(document.createElement("textarea"), { value: text, readOnly: true });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  };

  // Rows on demand: the first of many, those that a filter leaves, all when asked for and on paper.
  const form = document.querySelector(".filters");
  const wanted = new Set();
  const left = (item) => {
    if (!form) return true;
    return [...form.elements].every(({ name, value }) => {
      if (!name || !value) return true;
      if (name !== "find") return item.dataset[name] === value;
      return value.toLowerCase().split(/[\s,]+/).every((word) => (item.dataset.name || "").toLowerCase().includes(word));
    });
  };
  const demand = () => {
    for (const box of all(".demand")) {
      const most = wanted.has(box) ? Infinity : Number(box.dataset.most);
      const items = all("tbody > tr[data-name]", box).concat(all(":scope > details", box));
      const kept = items.filter(left);
      for (const item of items) { item.hidden = true; delete item.dataset.late; }
      kept.forEach((item, index) => { item.hidden = index >= most && !item.open; if (item.hidden) item.dataset.late = ""; });
      const button = box.querySelector(":scope > button.all");
      button.hidden = kept.length <= most;
      button.textContent = `show all ${kept.length}`;
      if (form && box.closest("#summary")) form.querySelector("output").textContent = kept.length < items.length ? `${kept.length} of ${items.length}` : "";
    }
  };
  for (const button of all("button.all")) button.addEventListener("click", () => { wanted.add(button.parentElement); demand(); });
  if (form) {
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => { write(event.target.name, event.target.value); demand(); });
  }

  // Legends: one click shows or hides a case in every figure that draws it as a line.
  const show = (series, shown) => {
    for (const twin of all(`.chips button[data-series="${series}"]`)) twin.setAttribute("aria-pressed", String(shown));
    for (const plot of plots()) {
      const traces = plot.data.flatMap((trace, index) => (trace.meta === series ? [index] : []));
      if (traces.length) Plotly.restyle(plot, { visible: shown }, traces);
    }
  };
  for (const chip of all(".chips button[data-series]")) {
    chip.addEventListener("click", () => {
      show(Number(chip.dataset.series), chip.getAttribute("aria-pressed") !== "true");
      write("hidden", [...new Set(all('.chips button[data-series][aria-pressed="false"]').map((one) => one.dataset.series))].join("."));
    });
  }

  // One step: one case at a time.
  const choices = all(".choice button");
  const choose = (choice) => {
    for (const other of choices) {
      other.setAttribute("aria-pressed", String(other === choice));
      document.getElementById(other.dataset.panel).hidden = other !== choice;
    }
    drawSeen();
    for (const plot of plots()) if (plot.closest(".panel:not([hidden])")) Plotly.Plots.resize(plot);
  };
  for (const choice of choices) choice.addEventListener("click", () => { choose(choice); write("step", choice.dataset.panel); });

  // Cases: what is inside one is made when it is opened; a link to one opens it.
  const fill = (details) => {
    const template = details.querySelector(":scope > template");
    if (!template) return;
    details.append(template.content);
    template.remove();
    sortable(details);
  };
  for (const details of all("details")) details.addEventListener("toggle", () => { if (details.open) fill(details); });
  const reveal = (anchor) => {
    const target = anchor ? document.getElementById(anchor) : null;
    if (!target) return;
    if (target instanceof HTMLDetailsElement) { fill(target); target.open = true; target.hidden = false; }
    target.scrollIntoView();
  };
  for (const link of all('a[href^="#"]')) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const { chosen } = read();
      const query = chosen.toString();
      history.pushState(null, "", `${link.hash}${query && "?" + query}`);
      reveal(decodeURIComponent(link.hash.slice(1)));
    });
  }
  addEventListener("hashchange", () => reveal(read().anchor));
  addEventListener("popstate", () => reveal(read().anchor));

  // Paper shows every case, and figures as wide as paper is.
  const PAPER = 700;
  addEventListener("beforeprint", () => {
    for (const details of all("details")) { fill(details); details.open = true; }
    for (const panel of all(".panel[hidden]")) { panel.hidden = false; panel.dataset.late = ""; }
    drawSeen();
    for (const plot of plots()) Plotly.relayout(plot, { width: PAPER, autosize: false });
  });
  addEventListener("afterprint", () => {
    for (const panel of all(".panel[data-late]")) { panel.hidden = true; delete panel.dataset.late; }
    for (const plot of plots()) Plotly.relayout(plot, { width: null, autosize: true });
  });

  // The page as the address says it.
  sortable(document);
  const { anchor, chosen } = read();
  if (form) for (const element of form.elements) if (element.name && chosen.get(element.name)) element.value = chosen.get(element.name);
  const [table, column, direction] = (chosen.get("sort") || "").split(".");
  const header = table && document.getElementById(`${table}-table`)?.querySelectorAll("thead th")[Number(column)];
  if (header) sort(header, direction === "down");
  demand();
  for (const series of (chosen.get("hidden") || "").split(".").filter(Boolean)) show(Number(series), false);
  const step = choices.find((choice) => choice.dataset.panel === chosen.get("step"));
  if (step) choose(step);
  for (const id of shown()) if (document.getElementById(id).getBoundingClientRect().top < innerHeight) draw(id);
  setTimeout(drawInTurn);
  reveal(anchor);

  document.getElementById("download").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("records").textContent], { type: "application/json" }));
    link.download = "records.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
