"""The rows of the table of what must work, one file a section; a test's name begins with the row it shows."""
