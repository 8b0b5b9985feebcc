"""The commands: one small module each, with `main(arguments)`. Heavy imports happen inside the command."""
