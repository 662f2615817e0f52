"""Starting the ranks of a run on one or many hosts, and seeing that they end together. Nothing here needs torch."""
