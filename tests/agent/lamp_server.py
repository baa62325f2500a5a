"""An MCP server with lamps, which a test starts as a child."""

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

server = MCPServer("lamps")
LAMPS = {"kitchen": "lamp-1", "hall": "lamp-2"}
SET: dict[str, float] = {}


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def find_lamp(room: str) -> str:
    """Gives the id of the lamp in a room."""
    if room not in LAMPS:
        raise ToolError(f"there is no lamp in the {room}, try again")
    return LAMPS[room]


@server.tool()
def dim(lamps: list[str], percent: int, seconds: float = 1.0, slowly: bool = False) -> str:
    """Dims lamps."""
    SET.update(dict.fromkeys(lamps, percent))
    return f"{', '.join(lamps)} at {percent} within {seconds} s{' slowly' * slowly}"


if __name__ == "__main__":
    server.run("stdio")
