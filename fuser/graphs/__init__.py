"""The two graphs a pass can run on.  Each is imported only for a model of its kind."""
