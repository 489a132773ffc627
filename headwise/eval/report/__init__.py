"""Reports: page, Markdown, figures, and the section of the model card."""
