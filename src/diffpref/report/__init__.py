"""The report: one HTML file with images side by side, numbers with intervals, curves, configuration and commands."""
