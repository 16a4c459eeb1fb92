"""The shell: files, clocks, terminals and processes around the pure core; what the command `fedhyper` runs."""
