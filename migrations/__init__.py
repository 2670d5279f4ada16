"""The history of the schema: one module per change, never edited once released."""
