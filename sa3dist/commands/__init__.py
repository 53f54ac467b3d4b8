"""What a person types: the subcommands of `sa3dist`."""
