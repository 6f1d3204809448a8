"""What every room may use: errors, files, settings, methods, shapes and their arithmetic, the machine."""
