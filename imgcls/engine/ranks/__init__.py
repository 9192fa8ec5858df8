"""Several processes that train together: started, stopped, joined, and their weights spread over them."""
