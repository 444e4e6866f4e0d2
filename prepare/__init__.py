"""The data sets, a folder each, and what their scripts share."""
