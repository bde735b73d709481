"""The repositories, and the abstract database that they use. `app.stores.sqlite` is the engine."""
