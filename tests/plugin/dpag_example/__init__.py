"""A method and a task for dpag."""
