"""Model families, one file each; `load(...)` of a family gives its Backbone."""
