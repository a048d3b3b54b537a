"""Chat templates and conversations that renderers are compared on. Data only."""

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

CONVERSATIONS = [
    [{"role": "user", "content": "Hi there"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 < 3 && \"x\" > 'y'?"}],
    [
        {"role": "system", "content": "  You are\na poet. "},
        {"role": "user", "content": " Write <b>bold</b> & caf\u00e9 \U0001f600\n"},
        {"role": "assistant", "content": "\u4f60\u597d {{ not a tag }} {% raw %}"},
        {"role": "user", "content": "\\n and \t tab"},
    ],
    [{"role": "user", "content": ""}],
    [{"role": "assistant", "content": "I speak first. Then I think.</think>done"}, {"role": "user", "content": "ok"}],
    [{"role": "tool", "content": "42"}, {"role": "tool", "content": "43"}, {"role": "user", "content": "ok"}],
]

TEMPLATES = {
    "alternation": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'].strip() + '\\n\\n' %}{% else %}{% set loop_messages = messages %}\
{% set system_message = '' %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate user/assistant, not ' ~ message.role) }}{% endif %}\
{% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}{% else %}\
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ '[U] ' + content.strip() + ' [/U]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + eos_token }}{% endif %}{% endfor %}""",
    "blocks": """{%- set ns = namespace(last='', n=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' and ns.last == 'tool' %}
        {%- continue %}
    {%- endif %}
    {%- set ns.last = message.role %}
    {%- set ns.n = ns.n + 1 %}
{{ '<' ~ loop.index ~ '/' ~ loop.length ~ ':' ~ message['role'] ~ '>' }}
{{ message['content'] | trim }}
    {%- if not loop.last %}
  {# a comment #}
    {%- endif %}
{% endfor %}
n={{ ns.n }}
{% if add_generation_prompt %}
<assistant>
{% endif %}

""",
    "json": """{{ messages | tojson }}
{{ messages[0] | tojson(indent=2) }}
{{ messages | tojson(sort_keys=True) }}
{{ messages[-1].content | tojson(ensure_ascii=True) }}
{{ {'b': [1, 2.5, -0.0, 1e20, 1e-7, true, none], 'a': {}, 'c': []} | tojson }}
{{ {'b': [1, [], {}], 'a': {'z': '</script>'}} | tojson(indent=4, sort_keys=true) }}
{{ [1, {'k': 'v'}] | tojson(separators=(',', ':')) }}""",
    "python_methods": """{% for m in messages %}{% if m.role.startswith('a') and '</think>' in m.content %}\
{{ m.content.split('</think>')[-1].lstrip('\\n') }}|{% else %}{{ m.content.strip().upper() }}|{% endif %}\
{{ m.content.replace('a', 'A').rstrip() }}|{{ m.role.title() }}|{{ m.content.split()|length }}|\
{{ m.get('name', 'nobody') }}|{{ m.items()|list|length }}|{{ m.content.find('e') }}|{{ m.content.endswith('?') }}\
{{ '\\n' }}{% endfor %}""",
    "undefined": """{{ tools }}{{ missing }}{% if tools is defined %}T{% endif %}{% if not tools %}no tools{% endif %}\
{% if messages[0].tool_calls %}calls{% endif %}{{ messages[0].name | default('anon') }}{{ strftime_now is defined }}\
{{ none }} {{ true }} {{ 1.0 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 2 ** 3 }} {{ messages|length > 1 }}""",
    "macros": """{% macro show(role, content, end='') %}[{{ role }}]{{ content }}{{ end }}{% endmacro %}\
{% for m in messages if m.role != 'system' %}{{ show(m.role, m.content, end=eos_token) }}{% else %}none{% endfor %}\
{% set roles = messages | map(attribute='role') | list %}{{ roles | join(',') }} {{ roles | unique | list | length }}\
{% set picked = messages | selectattr('role', 'equalto', 'user') | list %} {{ picked | length }}\
{% for m in messages[::-1] %}{% if loop.index > 2 %}{% break %}{% endif %}<{{ m.role }}>{% endfor %}""",
    "whitespace": """
  {% for message in messages %}
    {% if message.role == 'user' %}
  user: {{ message.content }}
    {% else %}
\t{{- message.role }}: {{ message.content -}}
    {% endif %}
  {% endfor %}
end  \t
""",
    "generation_blocks": """{% for m in messages %}
{%- if m.role == 'assistant' %}
    {% generation %}
    {{- m.content }}
    {%- endgeneration -%}
{%- else %}[{{ m.content }}]
{%- endif %}
{% endfor %}""",
    "tools": """{%- if not tools is defined %}{%- set tools = none %}{%- endif %}\
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}\
{%- if tools is not none %}Tools{%- else %}No tools{%- endif %} {{ date_string }} {{ documents is none }}""",
    "refuses_system": """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}ok""",
    "blows_up": """{{ messages[0].missing.deeper }}""",
}
