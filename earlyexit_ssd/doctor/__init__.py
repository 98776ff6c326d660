"""The doctor: checks of data sets and detectors. Each check compares a figure with a threshold."""
