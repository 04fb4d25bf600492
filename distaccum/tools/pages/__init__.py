"""Pages that need nothing else: charts as inline SVG, and the frame, style and tables that the tools' pages share."""
