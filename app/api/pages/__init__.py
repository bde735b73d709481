"""The admins' pages: rendered by the server from the same structs that JSON clients get, useful without JavaScript."""
