"""The doctor: named checks that find what is wrong with a data set or a detector, each a figure and its threshold."""
