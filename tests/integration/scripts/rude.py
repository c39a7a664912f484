"""Does what scripts do: prints megabytes, changes directory, forks, catches everything, and leaves
without a word."""

import multiprocessing
import os
import sys


def child() -> None:
    """A process of its own."""
    print("child", flush=True)


print(sys.argv, __name__, os.path.basename(__file__), sys.path[0] == os.path.dirname(os.path.abspath(__file__)))
for _ in range(30_000):
    print("x" * 99)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
os.makedirs("elsewhere", exist_ok=True)
os.chdir("elsewhere")
with open("made.txt", "w") as file:
    file.write("made")
try:
    sys.exit(3)
except BaseException as error:
    print("caught", repr(error), flush=True)
if sys.argv[1] == "raise":
    raise KeyError("the script says so")
os._exit(5)
