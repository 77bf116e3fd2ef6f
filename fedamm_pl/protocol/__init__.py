"""All that the author of a method sees: messages, sessions, reductions, and the base class of methods."""
