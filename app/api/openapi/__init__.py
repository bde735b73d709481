"""The OpenAPI document, and the methods that each path allows."""
