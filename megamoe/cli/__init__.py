"""One module per subcommand: read arguments, call, print. No logic."""
