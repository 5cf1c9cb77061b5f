"""What a client may ask, one file for each endpoint. Everything here is checked before any work; a field that nobody
knows is refused by name, and so is one that OpenAI names and this server does not do."""
