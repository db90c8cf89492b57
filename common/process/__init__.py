"""How a command starts, stops, reports progress and uses many cores; knows nothing about cells."""
