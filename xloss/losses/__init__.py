"""The trios Config / Kwargs / Context, one method a file. Pydantic lives here and nowhere below."""
