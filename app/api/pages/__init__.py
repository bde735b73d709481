"""The admins' pages. The server renders them from the structs of the JSON answers; they work without JavaScript."""
