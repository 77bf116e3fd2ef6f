"""The interface for authors of methods: messages, sessions, reductions, and the base class of methods."""
