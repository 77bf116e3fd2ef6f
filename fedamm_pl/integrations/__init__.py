"""The modules on the engines of others."""
