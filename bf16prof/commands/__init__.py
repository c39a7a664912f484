"""One file per subcommand: arguments in, a call, a report out. No logic of their own."""
