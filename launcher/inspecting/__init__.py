"""What a person looks at before a run: counts, sizes, formats, broken samples, equal content, a contact sheet."""
