"""Other frameworks' loss interfaces over this engine: one module a framework, which imports it when it is used."""
