"""What comes in over a connection and how it goes out: limits, bodies, events, errors. It knows no route."""
