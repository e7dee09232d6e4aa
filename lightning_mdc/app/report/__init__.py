"""How did it go? Numbers measured (`results`), as tables, pictures, and a report in words, Markdown and HTML."""
