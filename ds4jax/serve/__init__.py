"""A server for one model: the interfaces of OpenAI and Anthropic over HTTP."""
