"""The commands, a module each: options in, messages out. `swa_avg.cli` puts them together."""
