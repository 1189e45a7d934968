"""The built-in passes: one file each, the equation in its docstring; they know no framework."""
