"""The commands, a module each: options in, messages out. `swa_avg.cli.program` puts them together."""
