"""Arrays in, arrays out: no modules, no mesh."""
