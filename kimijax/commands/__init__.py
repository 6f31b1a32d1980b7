"""The subcommands of `kimijax`: options and one visible flow each; the work is done below."""
