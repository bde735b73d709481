"""Tests of `app.api.pages` and of the pages themselves, in a real browser."""
