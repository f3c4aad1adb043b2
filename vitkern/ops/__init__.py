"""The op layer: public functions, checks, schemas, autograd and the choice of a back-end."""
