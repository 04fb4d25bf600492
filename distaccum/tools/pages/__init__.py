"""Pages that need nothing else: charts as inline SVG, and the templates and styles that the tools' pages share."""
