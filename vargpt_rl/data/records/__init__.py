"""Training records: one schema, readers of the usual file formats, and importers of public data sets."""
