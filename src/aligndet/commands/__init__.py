"""One module a command; each function is the command and the Python API, and the home of its defaults."""
