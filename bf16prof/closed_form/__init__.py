"""The closed form: bytes from the list of parameter shapes and DeepSpeed's layout rules, in
milliseconds and without torch."""
