"""The outputs: records and runs in, text or HTML out. One file or package per output; none of them
imports torch or DeepSpeed."""
