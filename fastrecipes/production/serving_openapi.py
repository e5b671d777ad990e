"The server described to programs: OpenAPI 3.1."
__all__ = ['openapi']


def openapi(labels: list[str], max_mb: float, k: int, version: str) -> dict:
    "The description of a server that knows `labels`, takes uploads of `max_mb` MB and answers with the `k` best."
    error = _as_json({'$ref': '#/components/schemas/Error'})
    binary = {'schema': {'type': 'string', 'format': 'binary'}}
    form = {'type': 'object', 'required': ['my_img_file'], 'properties': {'my_img_file': {'type': 'string', 'format': 'binary', 'description': 'the image'}}}
    later = {'Retry-After': {'description': 'seconds to wait', 'schema': {'type': 'integer', 'minimum': 1}}}
    refusals = {'400': 'what was sent cannot be read: empty, truncated, too many pixels, no field my_img_file, k below 1', '408': 'the upload did not arrive in time',
                '413': f'the upload is larger than {max_mb:g} MB', '415': 'not an image, or of an unknown kind'}
    responses = {'200': {'description': 'the best labels and their probabilities, best first', **_as_json({'$ref': '#/components/schemas/Prediction'})}}
    responses |= {status: {'description': said} | error for status, said in refusals.items()}
    responses |= {'503': {'description': 'too many images are waiting', 'headers': later} | error}
    predict = {'summary': 'Classify an image', 'operationId': 'predict', 'responses': responses,
               'parameters': [{'name': 'k', 'in': 'query', 'description': 'labels an answer', 'schema': {'type': 'integer', 'minimum': 1, 'maximum': 999999, 'default': k}}],
               'requestBody': {'required': True, 'content': {'multipart/form-data': {'schema': form}, 'application/octet-stream': binary, 'image/*': binary}}}
    example = dict(zip(labels, (.7083, .1917, .0542)))
    schemas = {'Prediction': {'type': 'object', 'description': 'label: probability, 4 decimals, best first', 'additionalProperties': {'type': 'number', 'minimum': 0, 'maximum': 1},
                              'minProperties': 1, 'maxProperties': len(labels), 'example': example},
               'Card': {'type': 'object', 'required': ['labels', 'input'], 'properties': {'labels': {'type': 'array', 'items': {'type': 'string'}}, 'input': {'type': 'object'}}},
               'Status': {'type': 'object', 'required': ['status'], 'properties': {'status': {'enum': ['alive', 'ready']}}},
               'Error': {'type': 'object', 'required': ['error'], 'properties': {'error': {'type': 'string', 'description': 'one sentence'}}, 'additionalProperties': False}}
    status, text = _as_json({'$ref': '#/components/schemas/Status'}), lambda kind: {'content': {kind: {'schema': {'type': 'string'}}}}
    paths = {'/predict': {'post': predict},
             '/card': _get('What the model knows, and how right it is', _as_json({'$ref': '#/components/schemas/Card'})),
             '/healthz': _get('Whether the process lives', status),
             '/readyz': _get('Whether the model is loaded', status, {'503': {'description': 'not yet, or no more', 'headers': later} | error}),
             '/metrics': _get('Counters for Prometheus', text('text/plain')), '/': _get('A page to drop an image on', text('text/html')),
             '/openapi.json': _get('This', _as_json({'type': 'object'}))}
    return {'openapi': '3.1.0', 'info': {'title': 'fastrecipes', 'version': version, 'description': f'A classifier of images into {len(labels)} labels.'},
            'paths': paths, 'components': {'schemas': schemas}}


def _as_json(schema: dict) -> dict: return {'content': {'application/json': {'schema': schema}}}


def _get(summary: str, content: dict, more: dict | None = None) -> dict:
    return {'get': {'summary': summary, 'responses': {'200': {'description': summary} | content} | (more or {})}}
