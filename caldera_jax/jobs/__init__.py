"""What the commands do, and what they stand on: runs, files of a compressed model, processes, reports."""
