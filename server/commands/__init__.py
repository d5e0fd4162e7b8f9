"""One module per command or group, each with `register(app)`; heavy imports go inside the commands."""
