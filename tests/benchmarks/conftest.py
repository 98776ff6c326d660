"""The studies take their cases from the tests of the package and of its tools."""
